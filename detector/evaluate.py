"""A model's detections on a data set, and their scores."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from . import processes
from .config import Config
from .data.dataset import DetectionDataset
from .data.loader import EvalBatches, TransformedDataset, build_loader
from .data.transforms import EvalTransform
from .data.unreadable import Unreadable
from .engine import AMP_DTYPES, evaluate
from .evaluation.coco import evaluate_coco
from .evaluation.voc import evaluate_voc
from .model.faster_rcnn import C4FasterRCNN
from .model.speed import optimize
from .progress import Progress


class Evaluation:
    """Evaluates models on one data set with the recipe's settings. Its loader's workers live as long as it does.

    A picture that cannot be decoded is left out, unless `data.strict` is set: see `readable`.
    """

    def __init__(self, dataset: DetectionDataset, config: Config, device: torch.device) -> None:
        self.dataset, self.config, self.device = dataset, config, device
        self.unreadable = Unreadable(len(dataset), "left out")
        unreadable = "raise" if config.data.strict else "drop"
        transformed = TransformedDataset(dataset, EvalTransform(**config.model.resizing), 0, unreadable)
        batches = EvalBatches(dataset.aspect_ratios(), config.loader.eval_batch_size)
        pinned = device.type == "cuda"
        self.loader: DataLoader = build_loader(transformed, batches, config.loader.num_workers, pinned)

    def run(
        self, model: C4FasterRCNN, title: str = "evaluate"
    ) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Detections in COCO's results format, and mean losses, as `engine.evaluate` returns them. Shows progress.

        Several processes share the pictures, with the buffers of the first one's model. The first one gets all results.

        ValueError: too many pictures cannot be decoded, or one where `data.strict` is set.
        """
        processes.share_buffers(model)
        self.unreadable.begin()
        with Progress(len(self.dataset), title) as progress:
            found = evaluate(
                optimize(model, winograd=False),
                self.unreadable.watch(self.loader),
                self.device,
                category_ids=self.dataset.category_ids.tolist(),
                seed=self.config.train.seed,
                amp_dtype=AMP_DTYPES[self.config.train.amp],
                on_step=lambda num_images: progress.update(num_images * processes.world_size()),
            )
        self.unreadable.collect()
        return found

    @property
    def readable(self) -> DetectionDataset:
        """The data set without the pictures that the last run could not decode. It is the ground truth of its results."""
        failed = self.unreadable.image_ids
        if not failed:
            return self.dataset
        kept = ~np.isin(self.dataset.image_ids, list(failed.values()))
        return replace(self.dataset.subset(kept), left_out=(*self.dataset.left_out, *failed))


def score(dataset: DetectionDataset, results: list[dict], detections_per_img: int = 100) -> dict[str, Any]:
    """`evaluate_coco` of detections, and under "voc" VOC's AP of the same detections."""
    ground_truth = dataset.to_coco()
    coco = evaluate_coco(ground_truth, results, detections_per_img=detections_per_img)
    return {**coco, "voc": evaluate_voc(ground_truth, results)}
