"""krd_ray: distil one strong teacher into many small students on long-tailed images, on Ray."""

__version__ = "0.1.0"
