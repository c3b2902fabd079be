"""The demo on a real chat model: notes and conversations told among a novel, asked for with memory and without."""
