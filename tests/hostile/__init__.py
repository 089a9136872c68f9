"""Files and folders with one error each, and the error text that each must give."""
