"""Evaluation of a memory: retention over age, retriever health, abstention, harm to the decoder, value of context."""
