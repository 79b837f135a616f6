"""From files of any supported format to records: one query, its positives and negatives, memory-mapped from Arrow."""
