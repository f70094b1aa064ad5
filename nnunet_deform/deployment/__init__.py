"""Models outside of training: exported as ONNX, and whole scans predicted from such files."""
