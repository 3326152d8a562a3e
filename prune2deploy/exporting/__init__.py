"""Module → checked ONNX file: export, simplification, lower precision, parity."""
