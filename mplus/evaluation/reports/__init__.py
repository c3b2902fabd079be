"""Reports of evaluations: one format, its tables and plots, and several reports as one."""
