def find_claim(pattern):
    return lambda chat: None
