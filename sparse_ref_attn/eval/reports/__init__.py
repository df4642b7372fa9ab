"""What a comparison measured, as one JSON document: made here, stripped to be given away, and read again."""
