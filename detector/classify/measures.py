"""How well a classifier does: top-1, top-5, the confusion matrix, and each class.

Letters: N pictures, K classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..tables import format_table

_TOP = 5
# So many classes are told, the worst ones.
_MAX_CLASSES = 30


class Measures:
    """Counts of a classifier's answers. Counts of several processes are summed: `counts` is one tensor.

    counts: (K, K + 1) int64. Row k is the pictures of class k, column j those taken for class j. The last column is the
        pictures whose class is among the five likeliest.
    """

    def __init__(self, num_classes: int) -> None:
        self.counts = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits (N, K), labels (N,)."""
        num_classes = len(self.counts)
        if logits.shape[1] != num_classes:
            raise ValueError(f"logits are {tuple(logits.shape)}; accepted: (N, {num_classes})")
        self.counts = self.counts.to(logits.device)
        likeliest = logits.topk(min(_TOP, num_classes)).indices
        among = (likeliest == labels[:, None]).any(dim=1)
        cells = torch.cat(
            [labels * (num_classes + 1) + likeliest[:, 0], labels[among] * (num_classes + 1) + num_classes]
        )
        self.counts += torch.bincount(cells, minlength=self.counts.numel()).view_as(self.counts)

    def summary(self, class_names: Sequence[str]) -> dict[str, Any]:
        """The measures as JSON takes them; None where there are no pictures, or at most five classes for top-5.

        Keys: pictures, top1, top5 (shares of all pictures), mean_accuracy (mean of the classes), classes (name,
        pictures, accuracy, and `taken_for`, the commonest wrong answer), confusion (a row for each true class).
        """
        confusion = self.counts[:, :-1].cpu()
        pictures, right = confusion.sum(1), confusion.diagonal()
        total = int(pictures.sum())
        accuracies = [int(r) / int(n) if n else None for r, n in zip(right, pictures, strict=True)]
        known = [accuracy for accuracy in accuracies if accuracy is not None]
        has_top5 = total and len(confusion) > _TOP
        wrong = confusion - torch.diag(right)
        return {
            "pictures": total,
            "top1": int(right.sum()) / total if total else None,
            "top5": int(self.counts[:, -1].sum()) / total if has_top5 else None,
            "mean_accuracy": sum(known) / len(known) if known else None,
            "classes": [
                {
                    "name": name,
                    "pictures": int(pictures[k]),
                    "accuracy": accuracies[k],
                    "taken_for": class_names[int(wrong[k].argmax())] if wrong[k].any() else None,
                }
                for k, name in enumerate(class_names)
            ],
            "confusion": confusion.tolist(),
        }


def format_measures(summary: dict[str, Any]) -> str:
    """The measures as text: a line for all pictures, and a table of the classes, the worst first."""
    shares = [
        (name, summary[key])
        for name, key in (("top-1", "top1"), ("top-5", "top5"), ("mean of classes", "mean_accuracy"))
    ]
    line = ", ".join(f"{name} {value:.2%}" for name, value in shares if value is not None)
    worst = sorted(summary["classes"], key=lambda row: (row["accuracy"] is None, row["accuracy"] or 0))
    rows = [[row[key] for key in ("name", "pictures", "accuracy", "taken_for")] for row in worst]
    table = format_table(rows[:_MAX_CLASSES], ("class", "pictures", "accuracy", "most often taken for"))
    more = len(rows) - _MAX_CLASSES
    end = f"\nand {more} classes that do better" if more > 0 else ""
    return f"{summary['pictures']} pictures: {line or 'none'}\n{table}{end}"
