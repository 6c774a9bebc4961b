# What `make wheel` tries with the installed wheel, in an empty folder. No compiler: the wheel has the kernels.
export OMP_NUM_THREADS=1
python -m svdit selftest --quiet
svdit quantize --ckpt digits --preset w4a8 --rank 8 --no-figures --output small.safetensors
svdit inspect small.safetensors | grep "^backend on this machine: cpu"
svdit sample --ckpt small.safetensors --num-sampling-steps 5 --output small.png
for ckpt in digits small.safetensors; do
  svdit generate --ckpt $ckpt --sampler ddim --num-sampling-steps 10 --num-fid-samples 8 --sample-dir $ckpt-images
done
svdit evaluate --fake_dir small.safetensors-images --paired_dir digits-images --metrics paired
