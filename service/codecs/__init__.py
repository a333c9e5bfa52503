"""Bytes to named tensors and back: the Open Inference Protocol on /v2; JSON, safetensors, npy and npz on /v1."""
