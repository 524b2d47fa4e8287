"""Weight file formats: tensor name -> dtype, shape and byte range, read without the data."""
