"""Put memory into a decoder's attention: find its parts, run passes with a prefix, project and rotate rows."""
