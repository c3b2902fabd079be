"""Reading many memories at once: ``joint.py`` makes one reading of them, each as it is read alone."""
