"""Retention in the little language of facts: thousands of questions at once, over dense streams."""
