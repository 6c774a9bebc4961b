"""Files that are read and written with checks: what a file is, pickles, .npz archives, manifests, checksums."""
