"""Objects in images: boxes, detectors, and encoders whose attention follows them."""
