"""What a reader of the paper may skip: files, images, benchmarks, texts, scores, runs, reports."""
