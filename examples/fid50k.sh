#!/bin/sh
# FID of 50 000 images on the 8 GPUs of one host: DiT-XL/2 in full precision and quantized, and the table of both.
#
#     sh examples/fid50k.sh
#
# Nothing is stored but features and results (FOLDER/*/metrics.json). Run it again after an interruption: it resumes.
# The variables below can be set on the command line; MORE has further options of `svdit generate`.
set -eu
: "${CHECKPOINT:=pretrained_models/DiT-XL-2-256x256.pt}" "${REAL:=VIRTUAL_imagenet256_labeled.npz}" "${FOLDER:=fid50k}"
: "${PROTOCOL:=dit-250}" "${COUNT:=50000}" "${PROCESSES:=8}" "${MORE:=}"

sample() { # CHECKPOINT NAME
    torchrun --standalone --nproc-per-node "$PROCESSES" -m svdit generate --ckpt "$1" --sample-dir "$FOLDER/$2" \
        --protocol "$PROTOCOL" --num-fid-samples "$COUNT" --evaluate "$REAL" $MORE
}

mkdir -p "$FOLDER"
[ -e "$FOLDER/w8a8.safetensors" ] ||
    python -m svdit quantize --ckpt "$CHECKPOINT" --preset w8a8 --output "$FOLDER/w8a8.safetensors"
sample "$CHECKPOINT" full
sample "$FOLDER/w8a8.safetensors" w8a8
python -m svdit compare "$FOLDER/full" "$FOLDER/w8a8"
