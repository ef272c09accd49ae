"""Compare the detector with torchvision's of the same network on this machine. They take turns in one process.

"scaling" times ours alone while regions and pixels grow. "loader" and "evaluation" time reading and scoring, "stream" times
tools/infer.py, "classifier" a classifier's step. "training --profile" shows where the time of a recipe goes.

python tools/benchmark.py inference --sizes 600x800 800x1067 --proposals 1000 300 --memory --output inference.json
python tools/benchmark.py inference --device cuda --dtype bf16 --stock-dtype float32 --batch 8 --stock-channels-last
python tools/benchmark.py training --sizes 600x800 --regions 512 128 --memory --output training.json
python tools/benchmark.py training --profile trace.json.gz --config configs/shapes.yaml
python tools/benchmark.py scaling --memory --output scaling.json --plot scaling.png
python tools/benchmark.py loader --config configs/voc_resnet101.yaml data.root=/data/VOCdevkit --workers 2
python tools/benchmark.py stream --weights best.safetensors --images photos
python tools/benchmark.py evaluation --images 5000
python tools/benchmark.py classifier --output classifier.json
"""

import sys
from pathlib import Path

# The package `benchmarks` stands beside this folder and is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.command import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
