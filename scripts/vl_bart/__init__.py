"""VL-BART: a BART that answers questions about images and videos."""
