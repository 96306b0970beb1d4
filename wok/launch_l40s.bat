@setlocal
@set "CARD=l40s"
@set "VRAM=48GB"
@call "%~dp0launch.bat" %*
