def kill_savers(folder, kills):
    raise NotImplementedError
