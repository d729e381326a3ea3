"""Reading, writing, converting and retrofitting weights."""
