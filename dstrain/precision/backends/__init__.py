"""Who can compute products in FP8 on a GPU; each file imports its library, and is imported only where it is chosen."""
