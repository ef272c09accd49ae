"""Installation: `pip install -e .` from a clone; tools/ and configs/ are used from there."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "test": ["pytest>=8", "hypothesis>=6", "faster-coco-eval>=1.6", "timm>=1.0"],
    "fast": ["faster-coco-eval>=1.6"],
    "tensorboard": ["tensorboard>=2.15"],
    "timm": ["timm>=1.0"],
}

setup(
    name="fasterrcnn-c4",
    version="0.1.0",
    description="Faster R-CNN on convolutional backbones cut at conv4_x, composed of torchvision's detection parts",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["backbones", "backbones.*", "detector", "detector.*"]),
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "numpy>=1.26",
        "pycocotools>=2.0.8",
        "albumentations>=2.0,<2.1",
        "opencv-python-headless>=4.9",
        "pillow>=10",
        "pydantic>=2.7",
        "pyyaml>=6",
        "safetensors>=0.4.5",
        "scipy>=1.10",
        "tqdm>=4.66",
        "matplotlib>=3.8",
    ],
    extras_require={**EXTRAS, "dev": [*EXTRAS["test"], "ruff==0.17.6"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: BSD License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
