"""Measuring a memory: retention over age, harm to the decoder, retriever health, abstention; one report for all."""
