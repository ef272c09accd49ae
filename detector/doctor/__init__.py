"""Look for what is wrong with pictures and annotations before a training. tools/check_data.py prints it."""
