"""`tandem loadtest`: open-loop load with honest timing against any OpenAI-compatible endpoint."""
