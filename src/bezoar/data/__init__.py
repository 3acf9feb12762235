"""Records: image-caption pairs in memory or on disk, and the files that they are read from."""
