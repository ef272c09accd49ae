"""How often the host waits for a device, counted on a CPU by the operations that would wait on a GPU."""

import copy
from collections import Counter

import pytest
import torch
import torchvision  # noqa: F401 its operators are looked up by name
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from backbones import create_backbone
from detector.model.faster_rcnn import build_faster_rcnn
from detector.model.speed import Speed, apply_speed, optimize

# A step of N images may wait 2 N + 7 times, a detection of N images 4 N + 5 times. Some of these are counted and do not
# wait: an image has a `torch.tensor` or two of the host.
TRAINING, DETECTION = (2, 7), (4, 5)
WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.torchvision.nms.default,
}
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default}


class CountSyncs(TorchDispatchMode):
    """Counts operations whose result the host must know, and indexing by masks."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # torch fills a masked part with one number without knowing how large it is.
        fills = func is torch.ops.aten.index_put_.default and args[2].numel() == 1
        by_mask = (
            func in INDEXING
            and not fills
            and any(
                isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)
                for i in args[1]
                if i is not None
            )
        )
        if func in WAITING or by_mask:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def counted(monkeypatch):
    """Count `call()`. Reads and copies that the dispatcher does not show are counted by their methods."""

    def count(call):
        mode = CountSyncs()

        def watched(name, original):
            def method(self, *arguments, **options):
                mode.counts[name] += 1
                return original(self, *arguments, **options)

            return method

        with monkeypatch.context() as patch, mode:
            for name in ("tolist", "cpu", "numpy"):
                patch.setattr(Tensor, name, watched(name, getattr(Tensor, name)))
            for name in ("tensor", "as_tensor"):
                made = getattr(torch, name)
                patch.setattr(
                    torch,
                    name,
                    lambda *a, made=made, name=name, **o: mode.counts.update([name]) or made(*a, **o),
                )
            call()
        return mode.counts

    return count


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    built = build_faster_rcnn(
        create_backbone("resnet18", width=8, norm="batch"),
        5,
        anchor_sizes=(32, 64),
        min_size=128,
        max_size=160,
        rpn_post_nms_top_n_test=50,
    )
    # A GPU has no sparse product.
    return apply_speed(built, Speed(sparse_roi_align=False))


def batch(count):
    images = [torch.rand(3, 128, 160) for _ in range(count)]
    boxes = torch.tensor([[10.0, 20, 60, 90], [70, 8, 150, 100]])
    # As the loader gives them.
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 3]), "original_size": (128, 160)} for _ in images]
    return images, targets


@pytest.mark.parametrize("checked", [True, False])
def test_a_training_step_waits_seldom_for_the_device(model, counted, checked):
    model.train()

    def step(count):
        images, targets = batch(count)
        if not checked:
            # All boxes and labels that somebody else gives are checked by one read.
            targets = [{name: target[name] for name in ("boxes", "labels")} for target in targets]
        model.seed_sampling([(0, 0, i) for i in range(count)])
        losses = model(images, copy.deepcopy(targets))
        sum(losses.values()).backward()

    step(1)  # constants are made once
    for count in (1, 2, 4):
        seen = counted(lambda count=count: step(count))
        # One more for the check of finite numbers in the update.
        assert seen.total() + checked <= TRAINING[0] * count + TRAINING[1], seen
    model.seed_sampling(None)


def test_detection_waits_seldom_for_the_device(model, counted):
    fast = optimize(model.eval(), winograd=False)
    fast.detect(batch(1)[0])
    for count in (1, 2, 4):
        seen = counted(lambda count=count: fast.detect(batch(count)[0]))
        assert seen.total() <= DETECTION[0] * count + DETECTION[1], seen


def test_the_count_sees_what_waits(counted):
    mask = torch.tensor([True, False, True])
    values = torch.arange(3.0)

    def wait():
        values[mask], mask.nonzero(), float(values.sum()), values.tolist(), torch.tensor([1.0])

    assert counted(wait).total() >= 5
