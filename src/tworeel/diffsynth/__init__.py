"""DiffSynth-Studio's own training scripts, unmodified, with the transformer split over several devices.

DIFFSYNTH_DUAL_GPU=true python -m tworeel.diffsynth examples/wanvideo/model_training/train.py ...
"""
