"""The number of the first image of each purpose, so that nothing is judged on images that it was made from.

The noise and the class of image i are functions of (seed, i). Sampling and calibration start at 0.
"""

REPORTED_LAYERS = 2**32  # errors of layers and over time, in the report of a quantization
CACHING = 2**33  # trajectories by which a cache plan is made and checked
COMPARED = 2**34  # images by which --target-psnr and --preset auto choose
RECOVERY = 2**35  # trajectories that a recovery is trained on
RECOVERY_WEIGHTS = 2**36  # images that show how much an error counts
RECOVERY_HELD_OUT = 2**37  # images that stop a recovery
RECOVERY_REPORTED = 2**38  # images that a recovery is judged by
