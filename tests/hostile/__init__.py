"""Files and folders that are wrong in one way each, with the error text that each must give."""
