"""Files and hub datasets to rows of text."""
