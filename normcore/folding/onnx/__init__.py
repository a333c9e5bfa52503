"""Fold rules for ONNX graphs, one per linear operator."""
