

def folder_tokenizer(path, md):
    raise NotImplementedError
