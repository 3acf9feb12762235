"""Auditing: is this encoder backdoored?"""
