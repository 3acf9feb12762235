"""Records and how they come to be: image-caption pairs in memory or on disk, and the files they are read from."""
