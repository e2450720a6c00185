def draw(title, results, ping_ms):
    return "<svg xmlns='http://www.w3.org/2000/svg'/>"
