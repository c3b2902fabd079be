"""Numbers from answers: scores, intervals, AUROC, calibration, and the forgetting curve of theory."""
