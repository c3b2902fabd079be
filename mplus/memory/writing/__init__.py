"""Write text into a memory: cut it into chunks, run the write passes, hand the new rows to the mechanism."""
