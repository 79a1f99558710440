"""The checksums of a package; they live below ``artifact``, which opens packages too."""

from qwen_onnx.checksums import SUMS, check_sums, read_sums, rendered, sums_of, write_sums

__all__ = ["SUMS", "check_sums", "read_sums", "rendered", "sums_of", "write_sums"]
