#!/bin/sh
# Quantize and evaluate a DiT-XL/2 on a cluster without internet.
#
#     sh examples/offline_cluster.sh fetch    # from the repository, with internet and the cluster's Python and platform
#     sh examples/offline_cluster.sh run      # on the cluster, in a folder that contains offline/
#
# `fetch` puts packages and weights into offline/. docs/scale.md has jobs for SLURM and several hosts. Run `run` again
# after an interruption: it resumes.
set -eu
: "${COUNT:=50000}" "${PROCESSES:=8}" "${MORE:=}"
CHECKPOINT=offline/DiT-XL-2-256x256.pt

case ${1:-} in
fetch)
    pip wheel --wheel-dir offline/wheels --constraint constraints.txt '.[vae,eval]'
    hf download stabilityai/sd-vae-ft-ema --local-dir offline/vae
    cd offline
    curl --fail --location --remote-name https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt
    curl --fail --location --remote-name https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth
    curl --fail --location --remote-name https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/VIRTUAL_imagenet256_labeled.npz
    ;;
run)
    pip install --no-index --find-links offline/wheels 'svdit[vae,eval]'
    export SVDIT_INCEPTION_WEIGHTS="$PWD/offline/weights-inception-2015-12-05-6726825d.pth" HF_HUB_OFFLINE=1
    [ -e w8a8.safetensors ] || python -m svdit quantize --ckpt "$CHECKPOINT" --preset w8a8 --output w8a8.safetensors
    torchrun --standalone --nproc-per-node "$PROCESSES" -m svdit generate --ckpt w8a8.safetensors --vae offline/vae \
        --num-fid-samples "$COUNT" --sample-dir samples $MORE
    torchrun --standalone --nproc-per-node "$PROCESSES" -m svdit evaluate --fake_dir samples \
        --real_dir offline/VIRTUAL_imagenet256_labeled.npz --output results
    ;;
*)
    echo "usage: sh $0 fetch|run" >&2
    exit 2
    ;;
esac
