"""What people read: progress, tables, the model card."""
