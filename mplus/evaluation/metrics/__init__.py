"""Numbers from answers: scores, AUROC and calibration, and the forgetting curve of theory."""
