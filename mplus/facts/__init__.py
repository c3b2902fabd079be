"""A little language of facts: told once, then asked for after many others. A decoder of minutes learns it."""
