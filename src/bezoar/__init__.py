"""bezoar: is this data set poisoned, is this encoder backdoored, and what now?"""
