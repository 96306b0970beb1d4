@setlocal
@set "CARD=l4"
@set "VRAM=24GB"
@call "%~dp0launch.bat" %*
