"""Training on photographs; slow, and skipped where the shared data are absent."""

from pathlib import Path

import pytest
import torch

from detector.config import load_config
from detector.run import Run

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@pytest.mark.slow
def test_eight_photographs_of_coco128_are_learned_by_heart(shared, tmp_path):
    config = load_config(
        CONFIGS / "coco128_resnet18.yaml",
        [f"data.root={shared / 'data' / 'coco128'}", "loader.num_workers=1"],
    )
    assert config.data.train[0].limit == 8
    metrics = Run(config, tmp_path, torch.device("cpu")).train()
    assert metrics["AP50"] >= 0.9


@pytest.mark.parametrize(
    ("config_name", "folder", "num_images"),
    [("bccd_resnet18.yaml", "bccd", (205, 87)), ("foda_resnet18.yaml", "foda", (1240, 310))],
)
def test_the_recipes_read_the_real_sets(shared, config_name, folder, num_images):
    from detector.data.sources import build_dataset

    config = load_config(CONFIGS / config_name, [f"data.root={shared / 'data' / folder}"])
    train_set = build_dataset(config.data, "train")
    val_set = build_dataset(config.data, "val", train_set.class_names)
    assert (len(train_set), len(val_set)) == num_images
    assert val_set.class_names == train_set.class_names
    assert len(train_set.problems) + len(val_set.problems) == (2 if folder == "bccd" else 0)
