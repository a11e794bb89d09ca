"""What the paper does not need to be understood: options, files, downloads, formats, pictures, measurements."""
