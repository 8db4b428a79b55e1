"""Whether the files that people have are read right, and whether questions over them are answered right."""
