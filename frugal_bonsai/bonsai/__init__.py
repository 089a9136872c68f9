"""The method: importance, masks, selection and reconstruction, a folder for each step."""
